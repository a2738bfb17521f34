"""Judges of images and checkpoints, which know nothing about methods: what is measured is stored once, as it was seen.

    generate    prompts x seeds -> a folder of images
    nudity      NudeNet on a folder, counted under any of the protocols in use
    quality     CLIP score, FID, KID, CMMD and same-seed drift of folders
    concepts    the pocket oracle on a folder: UA, IRA, CRA
    grid        contact sheets: rows are prompts, columns are models
    report      everything in one page

What a folder of images holds (`eval.images.folder` reads it):

    generation.json   how the images were asked for: model, unet, prompts, scheduler, steps, guidance, ...
    manifest.jsonl    one line an image, in the order of the prompts: file, row, prompt, seed, broken, sha256, ...
    00012_4889.png    row and seed; prompts stay out of file names
    detections.jsonl  every box of every image, whatever its score                         eval.nudity
    nudity.json  quality.json  concepts.json  grid.png                                     the judges' results

Write `from eval import x`: a bare `import eval` hides Python's builtin.
"""
