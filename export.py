"""Exports a model to ONNX: `python export.py --checkpoint OUT/best --output_dir ONNX`."""

import sys

from pix2seq.export import main

if __name__ == "__main__":
    sys.exit(main())
