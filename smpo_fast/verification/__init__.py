"""Which artefact a folder holds, and verifying it (``smpo verify``).

The package that owns a format verifies it, in its ``verify.py``; this package knows all of them, and a whole run.
"""
