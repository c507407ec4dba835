"""The model, its config, its image processor and the pipeline pass the test suites of transformers.

The suites are those of the installed version of transformers; `make test-hf` downloads and runs them. Tests that the
model is not meant to pass are listed in expected_failures.py.
"""

import contextlib
import copy
import tempfile
import unittest
from fnmatch import fnmatch
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection, BlenderbotConfig, LlamaConfig, pipeline
from transformers.testing_utils import torch_device

from pix2seq import Pix2SeqConfig, Pix2SeqForObjectDetection, Pix2SeqImageProcessor
from pix2seq.tokenizer import TOKENS_PER_OBJECT, Tokenizer
from tests.hf import sources
from tests.hf.expected_failures import DISABLED_OPTIONS, EXPECTED_FAILURES

pytestmark = pytest.mark.slow
if not sources.FOLDER.exists():
    pytest.skip(f"{sources.FOLDER} is missing: `make test-hf` downloads it", allow_module_level=True)
pytest.importorskip("parameterized", reason="the suites import parameterized, see requirements-dev.txt")

# Suites are imported as modules: pytest would collect test classes that are names of this module.
configuration_suite = sources.import_suite("test_configuration_common")
image_processing_suite = sources.import_suite("test_image_processing_common")
modeling_suite = sources.import_suite("test_modeling_common")

DECODERS = ("llama", "transformer")
CLASSES = ("circle", "square", "star")
BACKBONES = {
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 16, 16],
        "depths": [1, 1, 1],
        "layer_type": "basic",
    },
    "vit": {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 16,
    },
}
NUM_BINS, MAX_OBJECTS = 20, 3
TOKENIZER = Tokenizer(len(CLASSES), NUM_BINS)


class Pix2SeqModelTester:
    """Makes the configs and inputs for `ModelTesterMixin`.

    Args:
        decoder: "llama" or "transformer".
        backbone: A key of `BACKBONES`.
        teacher_forced: Whether the inputs contain `input_ids`. Without them, the model predicts boxes.
    """

    is_training = True
    batch_size = 3
    image_size = 32
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    num_visual_tokens = 4  # image_size / 16, squared

    def __init__(self, decoder: str, teacher_forced: bool, backbone: str = "resnet"):
        self.decoder, self.teacher_forced, self.backbone = decoder, teacher_forced, backbone
        self.encoder_seq_length = self.num_visual_tokens
        # From pixels alone, BOS and all tokens but the last one are inputs.
        self.num_tokens = TOKENS_PER_OBJECT * MAX_OBJECTS
        self.seq_length = self.num_tokens

    def get_config(self) -> Pix2SeqConfig:
        """Returns the config of a small model."""
        common = {
            "vocab_size": TOKENIZER.vocab_size,
            "max_position_embeddings": self.num_tokens + 2,
            "tie_word_embeddings": True,
            "pad_token_id": TOKENIZER.pad_id,
            "bos_token_id": TOKENIZER.bos_id,
            "eos_token_id": TOKENIZER.eos_id,
        }
        if self.decoder == "llama":
            decoder_config = LlamaConfig(
                hidden_size=self.hidden_size,
                intermediate_size=64,
                num_hidden_layers=self.num_hidden_layers,
                num_attention_heads=self.num_attention_heads,
                **common,
            )
        else:
            decoder_config = BlenderbotConfig(
                d_model=self.hidden_size,
                decoder_layers=self.num_hidden_layers,
                decoder_attention_heads=self.num_attention_heads,
                decoder_ffn_dim=64,
                encoder_layers=self.num_hidden_layers,
                encoder_attention_heads=self.num_attention_heads,
                encoder_ffn_dim=64,
                dropout=0.0,
                is_decoder=True,
                is_encoder_decoder=False,
                **common,
            )
        return Pix2SeqConfig(
            backbone_config=dict(BACKBONES[self.backbone]),
            decoder_config=decoder_config,
            projector_mlp=self.decoder == "transformer",
            output_bias=self.decoder == "transformer",
            hidden_size=self.hidden_size,
            encoder_layers=self.num_hidden_layers,
            encoder_heads=self.num_attention_heads,
            encoder_mlp_size=64,
            dropout=0.0,
            drop_path=0.0,
            image_size=self.image_size,
            num_bins=NUM_BINS,
            max_objects=MAX_OBJECTS,
            category_ids=(1, 2, 3),
            id2label=dict(enumerate(CLASSES)),
            label2id={name: label for label, name in enumerate(CLASSES)},
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[Pix2SeqConfig, dict[str, torch.Tensor]]:
        """Returns a config, and the arguments of the model without labels."""
        inputs = {"pixel_values": torch.rand(self.batch_size, 3, self.image_size, self.image_size)}
        if self.teacher_forced:
            inputs["input_ids"] = torch.randint(1, TOKENIZER.vocab_size, (self.batch_size, self.num_tokens))
        return self.get_config(), {name: value.to(torch_device) for name, value in inputs.items()}

    def make_labels(self) -> torch.Tensor | list[dict[str, torch.Tensor]]:
        """Returns token ids (B, L) for teacher forcing; otherwise two objects per image, as for DETR."""
        if self.teacher_forced:
            rows = torch.arange(self.batch_size * self.num_tokens, device=torch_device)
            return (rows % (TOKENIZER.vocab_size - 2) + 2).view(self.batch_size, self.num_tokens)  # not PAD, not BOS
        return [
            {
                "class_labels": torch.tensor([0, 2], device=torch_device),
                "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2], [0.3, 0.6, 0.2, 0.2]], device=torch_device),
            }
            for _ in range(self.batch_size)
        ]


class ModelTests(modeling_suite.ModelTesterMixin):
    """`ModelTesterMixin` with the inputs and outputs of object detection. Subclasses set the configuration."""

    all_model_classes = (Pix2SeqForObjectDetection,)
    decoder: str
    teacher_forced: bool
    backbone = "resnet"
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # run this test, although the file has no copyright year

    def setUp(self):
        torch.manual_seed(0)
        self.model_tester = Pix2SeqModelTester(self.decoder, self.teacher_forced, self.backbone)
        self.additional_model_inputs = ["input_ids"] if self.teacher_forced else []

    def subTest(self, *args, **kwargs):  # noqa: N802
        """Does nothing, because pytest does not count a failed subtest of an xfail test as a failure of the test."""
        return contextlib.nullcontext()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels:
            inputs["labels"] = self.model_tester.make_labels()
        return inputs

    def make_model(self, **options) -> tuple[Pix2SeqForObjectDetection, dict]:
        """Returns a model in eval mode that computes attention weights, and its inputs."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for name, value in options.items():
            setattr(config, name, value)
        model = Pix2SeqForObjectDetection._from_config(config, attn_implementation="eager")
        return model.to(torch_device).eval(), inputs

    # The suite reads `attentions` and `hidden_states`, or requires one sequence length and no projector. The tests of
    # DETR and of other models with encoder and decoder override these tests too.

    def test_attention_outputs(self):
        tester = self.model_tester
        heads, visual, tokens = tester.num_attention_heads, tester.num_visual_tokens, tester.num_tokens
        shapes = {"encoder_attentions": (heads, visual, visual)}
        if self.teacher_forced and self.decoder == "llama":
            shapes["decoder_attentions"] = (heads, visual + tokens, visual + tokens)
        elif self.teacher_forced:
            shapes["decoder_attentions"] = (heads, tokens, tokens)
            shapes["cross_attentions"] = (heads, tokens, visual)
        self.check_outputs("output_attentions", shapes, tester.num_hidden_layers)

    def test_hidden_states_output(self):
        tester = self.model_tester
        shapes = {"encoder_hidden_states": (tester.num_visual_tokens, tester.hidden_size)}
        if self.teacher_forced:
            num_visual = tester.num_visual_tokens if self.decoder == "llama" else 0
            shapes["decoder_hidden_states"] = (num_visual + tester.num_tokens, tester.hidden_size)
        self.check_outputs("output_hidden_states", shapes, tester.num_hidden_layers + 1)

    def check_outputs(self, option: str, shapes: dict[str, tuple[int, ...]], count: int) -> None:
        """Checks fields of the output, with the option as an argument, in the config, and not set."""
        model, inputs = self.make_model()
        configured, _ = self.make_model(**{option: True})
        with torch.no_grad():
            outputs, without = model(**inputs, **{option: True}), model(**inputs)
            for output in (outputs, configured(**inputs)):
                for name, shape in shapes.items():
                    assert len(output[name]) == count, name
                    for tensor in output[name]:
                        assert tuple(tensor.shape) == (self.model_tester.batch_size, *shape), name
        assert set(outputs) - set(without) == set(shapes)

    def test_retain_grad_hidden_states_attentions(self):
        model, inputs = self.make_model(output_hidden_states=True, output_attentions=True)
        outputs = model.train()(**self._prepare_for_class(inputs, type(model), return_labels=True))
        names = ["encoder_hidden_states", "encoder_attentions", "decoder_hidden_states", "decoder_attentions"]
        if self.decoder == "transformer":
            names.append("cross_attentions")
        for name in names:
            outputs[name][0].retain_grad()
        outputs.loss.backward()
        for name in names:
            assert outputs[name][0].grad is not None, name

    # The suite cannot compare attention implementations from pixels alone, see expected_failures.py.

    def test_attention_implementations_give_the_same_outputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        eager = Pix2SeqForObjectDetection._from_config(config, attn_implementation="eager").to(torch_device).eval()
        name = "logits" if self.teacher_forced else "pred_scores"
        expected = eager(**inputs)[name]
        with tempfile.TemporaryDirectory() as folder:
            eager.save_pretrained(folder)
            for option in ({}, {"attn_implementation": {"decoder_config": "sdpa", "": "sdpa"}}):
                model = Pix2SeqForObjectDetection.from_pretrained(folder, **option).to(torch_device)
                implementation = model.decoder.config._attn_implementation
                default = "prefix" if self.decoder == "llama" else "sdpa"
                assert implementation == ("sdpa" if option else default)
                torch.testing.assert_close(model(**inputs)[name], expected, rtol=1e-4, atol=1e-5)

    def test_resizing_the_token_embeddings_is_refused(self):
        model, _ = self.make_model()
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        with pytest.raises((NotImplementedError, ValueError)):
            model.resize_token_embeddings(TOKENIZER.vocab_size + 10)
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes

    # The source distribution contains no tests of the exporters.

    def test_torch_export(self):
        model, inputs = self.make_model()
        if not self.teacher_forced:
            with pytest.raises(Exception, match=r"export\.py"):
                torch.export.export(model, (), inputs)
            return
        exported = torch.export.export(model, (), inputs).module()
        with torch.no_grad():
            torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits)

    def test_torch_jit_trace(self):
        model, inputs = self.make_model(return_dict=False)
        if not self.teacher_forced:
            with pytest.raises(Exception, match=r"export\.py"):
                torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
            return
        # The check compares names in the graphs, which differ. Other inputs show whether the graph is right.
        traced = torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)
        inputs = {name: value.flip(0) for name, value in inputs.items()}
        with torch.no_grad():
            torch.testing.assert_close(traced(**inputs)[0], model(**inputs)[0])


for option in DISABLED_OPTIONS:
    assert getattr(ModelTests, option) is True, f"{option} is no option of ModelTesterMixin"
    setattr(ModelTests, option, False)


class LlamaTeacherForcedTest(ModelTests, unittest.TestCase):
    decoder, teacher_forced = "llama", True


class LlamaPixelsTest(ModelTests, unittest.TestCase):
    decoder, teacher_forced = "llama", False


class TransformerTeacherForcedTest(ModelTests, unittest.TestCase):
    decoder, teacher_forced = "transformer", True


class TransformerPixelsTest(ModelTests, unittest.TestCase):
    decoder, teacher_forced = "transformer", False


# All parts of these models support SDPA; ResNet has no attention and rejects it.


class LlamaViTTest(ModelTests, unittest.TestCase):
    decoder, teacher_forced, backbone = "llama", True, "vit"


class TransformerViTTest(ModelTests, unittest.TestCase):
    decoder, teacher_forced, backbone = "transformer", True, "vit"


class ConfigTest(unittest.TestCase):
    """`ConfigTester`, with one test per method."""

    decoder = "llama"

    def setUp(self):
        self.model_tester = Pix2SeqModelTester(self.decoder, teacher_forced=True)


class TransformerConfigTest(ConfigTest):
    decoder = "transformer"


def _add_config_tests() -> None:
    def make_test(method: str):
        def test(self):
            tester = configuration_suite.ConfigTester(
                self, config_class=Pix2SeqConfig, has_text_modality=False, hidden_size=32, num_bins=20
            )
            getattr(tester, method)()

        return test

    for method in dir(configuration_suite.ConfigTester):
        if method.startswith(("create_and_test_", "check_")):
            setattr(ConfigTest, f"test_{method.removeprefix('create_and_test_')}", make_test(method))


_add_config_tests()


class Pix2SeqImageProcessingTester(image_processing_suite.ImageProcessingTester):
    """Makes the arguments and inputs for `ImageProcessingTestMixin`."""

    def __init__(self):  # the base class of some versions looks for the classes in the folder of the file
        self.batch_size, self.num_channels, self.min_resolution, self.max_resolution = 7, 3, 30, 400
        self.size = {"height": 20, "width": 20}

    def prepare_image_processor_dict(self):
        return {"size": self.size}


class ImageProcessingTest(image_processing_suite.ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes: ClassVar = {"torchvision": Pix2SeqImageProcessor}

    def setUp(self):
        np.random.seed(0)
        self.image_processor_tester = Pix2SeqImageProcessingTester()

    @property
    def image_processor_dict(self):
        return self.image_processor_tester.prepare_image_processor_dict()


# The source distribution does not contain the tests of the pipelines, which need a network. These check what the test
# of the object detection pipeline checks.


@pytest.fixture(scope="module", params=DECODERS)
def model_folder(request, tmp_path_factory):
    """A `from_pretrained` folder."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = Pix2SeqForObjectDetection(Pix2SeqModelTester(request.param, teacher_forced=False).get_config())
    model.save_pretrained(folder)
    Pix2SeqImageProcessor.from_model_config(model.config).save_pretrained(folder)
    return folder


def make_image(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def check_detections(detections: list[dict]) -> None:
    assert detections
    for detection in detections:
        assert set(detection) == {"score", "label", "box"}
        assert isinstance(detection["score"], float)
        assert detection["label"] in CLASSES
        assert set(detection["box"]) == {"xmin", "ymin", "xmax", "ymax"}
        assert all(isinstance(value, int) for value in detection["box"].values())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_pipeline_of_a_file(model_folder, dtype, tmp_path):
    make_image().save(tmp_path / "image.png")
    detect = pipeline("object-detection", model=str(model_folder), dtype=dtype)
    assert str(detect.model.dtype) == f"torch.{dtype}"
    check_detections(detect(str(tmp_path / "image.png"), threshold=0.0))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_of_a_batch(model_folder, batch_size):
    """Images of several modes and sizes."""
    detect = pipeline("object-detection", model=str(model_folder))
    images = [make_image(), make_image("RGBA"), make_image("LA", (40, 90)), make_image("L"), make_image("P")]
    results = detect(images, threshold=0.0, batch_size=batch_size)
    assert len(results) == len(images)
    for detections in results:
        check_detections(detections)


def test_pipeline_of_model_and_image_processor(model_folder):
    model = AutoModelForObjectDetection.from_pretrained(model_folder)
    image_processor = AutoImageProcessor.from_pretrained(model_folder)
    detect = pipeline("object-detection", model=model, image_processor=image_processor)
    assert detect(make_image(), threshold=0.0) == pipeline("object-detection", model=str(model_folder))(
        make_image(), threshold=0.0
    )


def test_pipeline_threshold(model_folder):
    detect = pipeline("object-detection", model=str(model_folder))
    scores = [detection["score"] for detection in detect(make_image(), threshold=0.0)]
    threshold = sorted(scores)[len(scores) // 2]
    kept = [detection["score"] for detection in detect(make_image(), threshold=threshold)]
    assert kept == [score for score in scores if score > threshold]


def test_every_expected_failure_is_the_name_of_a_test(request):
    if request.config.getoption("keyword") or any("::" in argument for argument in request.config.args):
        pytest.skip("not all tests are selected")
    names = [item.nodeid.split("::", 1)[-1].replace("::", ".") for item in request.session.items]
    assert [pattern for pattern in EXPECTED_FAILURES if not any(fnmatch(name, pattern) for name in names)] == []
