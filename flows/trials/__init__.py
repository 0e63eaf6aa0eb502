"""The trials of a study at work: on processes of this machine, or on Dask or Ray."""
