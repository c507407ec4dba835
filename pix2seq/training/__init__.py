"""The parts of a training run. `pix2seq.train` has the training loop."""
