"""Which network classifies? Plain torch, with torchvision's parameter names.

networks     the networks, and `build`, which makes one by name
pretrained   weights from elsewhere: torchvision's files, and whole classifiers of `transformers`
"""
