"""Organ banks: versions of organs in a folder, behind any fsspec URL, on the Hugging Face Hub or in an OCI registry."""
