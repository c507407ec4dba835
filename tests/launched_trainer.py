"""Evaluates with transformers' Trainer on the ranks of a launcher, and on one process, and writes the predictions.

python -m torch.distributed.run --nproc_per_node=2 tests/launched_trainer.py FOLDER
"""

import os
import sys
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent.parent))
from pix2seq import Pix2SeqImageProcessor
from tests.test_huggingface import ListDataset, examples, new_model


def main(folder: Path) -> None:
    model = new_model("llama", noise_objects=False)
    dataset = ListDataset(examples(Pix2SeqImageProcessor.from_model_config(model.config)))
    predictions = []
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder), per_device_eval_batch_size=3, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        eval_dataset=dataset,
        compute_metrics=lambda evaluated: predictions.append(evaluated.predictions) or {},
    )
    trainer.evaluate()
    if int(os.environ.get("RANK", 0)) == 0:
        tensors = [torch.from_numpy(array) for array in predictions[0]]
        torch.save(tensors, folder / f"{os.environ.get('WORLD_SIZE', 1)}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads may abort an exiting process


if __name__ == "__main__":
    main(Path(sys.argv[1]))
