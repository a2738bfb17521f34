"""Which examples does a run see? Data sets, wherever they come from, and how they are divided.

dataset      what a data set is: pixels, labels and ids, all in memory
splits       which examples train, validate and are to be forgotten, reproducibly
partition    a data set divided into forget set, retain set, validation and test
embed        makes the embedded images from the original files
transforms   crops and flips on tensors
sources      where data sets come from: a folder in its original format, the Hub, or scikit-learn
"""
