"""YAML presets: the name of a file here, without its ending, is what `--config` takes."""
