"""How the embedded model was trained, and how to train it again."""
