"""How is a run carried out? Each in a folder of its own, resumed where it stopped.

jobs      train the original model, make it forget, measure; many jobs in a pool of processes
measure   what is measured once on the network of a finished run
"""
