"""The offline builder: text in, a memory-mapped Arrow dataset out. See `python -m data_prep --help`."""
