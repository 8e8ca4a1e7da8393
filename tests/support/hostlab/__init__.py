"""An emulated server for the hardware paths: `make lab`.

``recipe`` says what it is made of, ``build`` makes its tree and its disk, ``machine`` is one running QEMU, ``server`` is what
a test does with one (ssh, our agent in it), ``__main__`` the command line. Nothing of the product imports it.
"""
