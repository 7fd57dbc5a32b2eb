"""The families of models that files are read and written of, one a file."""
