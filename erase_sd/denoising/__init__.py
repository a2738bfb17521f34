"""How is a concept erased from a diffusion model: from which data, by which losses, with which results?

concept  the concept's prompts, its previews before and after, and who can judge them
samples  the model's own images as latents, and their captions as token embeddings
task     DenoisingTask: the losses, in one process or several
sharded  the same on a network that is divided among the processes
results  what a run leaves in its folder
card     the model card
"""
