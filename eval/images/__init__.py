"""A folder of images: how is it asked for, written, read, and set beside another?

    folder      reads a folder: entries, how it was generated, what is broken
    sources     prompts by name or file, and the images that each row asks for
    pipelines   the model that is sampled, with its network and scheduler
    writer      fills a folder, resumable and shared by processes
    match       the same prompt and seed in several folders

What the files of a folder are is in the docstring of `eval`.
"""
