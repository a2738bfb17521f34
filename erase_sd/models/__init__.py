"""How is a diffusers pipeline loaded, checked, encoded, sampled and saved, whatever its family?

pipeline    load, encode, sample, save
families    what each kind of pipeline is made of and how its network is called
foreign     what other projects publish in the place of a model
ldm_names   CompVis' names for a UNet's weights
checks      is this folder, or this pipeline, a sound model?
guidance    Safe Latent Diffusion as a hook that a network carries
noise       the forward process: diffusion or flow
parameters  named groups of parameters, normalisation layers apart
placement   devices and precision while a run needs the parts
"""
