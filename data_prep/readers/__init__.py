"""How each kind of file is read: `base` says what a reader is, `registry` which there are."""
