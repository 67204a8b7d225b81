"""The ranker: a small in-context Transformer that predicts scores of encoders from the encoders evaluated so far."""
