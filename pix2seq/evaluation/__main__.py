import sys

from pix2seq.evaluation.commands import main

sys.exit(main(sys.argv[1:]))
