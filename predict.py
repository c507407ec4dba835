"""Detects objects: `python predict.py --checkpoint OUT/best image.jpg folder/`."""

import sys

from pix2seq.predict import main

if __name__ == "__main__":
    sys.exit(main())
