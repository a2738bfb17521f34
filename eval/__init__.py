"""Judges of images and checkpoints, which know nothing about methods. Nothing here yet.

Write `from eval import x`: a bare `import eval` hides Python's builtin.
"""
