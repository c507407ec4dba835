"""Estimates the cost of a training run: `python plan.py --config configs/coco_r50.yaml --gpu h100`."""

import sys

from pix2seq.plan import main

if __name__ == "__main__":
    sys.exit(main())
