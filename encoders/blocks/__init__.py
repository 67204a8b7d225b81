"""Built-in blocks: one file per block (or per pair of twins); every module here is imported by the registry."""
