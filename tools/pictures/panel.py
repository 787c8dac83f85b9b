# %% the panel, with two models loaded: python tools/screenshots.py tools/pictures/panel.py docs/images
import nbinfer as nb

nb.load("demo")
nb.load("demo-embed")
nb.infer("Write Python code to plot a sine wave.", model="demo")
nb.panel("demo")
