"""Computes COCO metrics: `python evaluate.py --checkpoint OUT/best --root /path/to/coco`."""

import sys

from pix2seq.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
