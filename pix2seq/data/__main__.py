import sys

from pix2seq.data.commands import main

sys.exit(main(sys.argv[1:]))
