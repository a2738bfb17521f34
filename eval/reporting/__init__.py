"""What stands on the report's page?

inputs.py           run folders and evaluated folders of images, read and checked
blocks.py           what a section is made of: notes, tables, galleries, sheets, pictures
run_sections.py     sections about runs: scores, curves, record, protocols
image_sections.py   sections about images: side by side, counts, the worst of them, quality
figure.py           the paper's Fig. 3: the change of exposed parts in percent
page.html.j2        the page as HTML, one file that opens offline
page.md.j2          the page as Markdown
"""
