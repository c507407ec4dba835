"""Trains a model: `accelerate launch train.py --root /path/to/coco`."""

import sys

from pix2seq.train import main

if __name__ == "__main__":
    sys.exit(main())
