# %% how sure the model was: python tools/screenshots.py tools/pictures/sure.py docs/images
import nbinfer as nb

nb.load("demo")
story = nb.infer("Tell me a story about a dog.", temperature=1.2, seed=5, logprobs=3)
story.show_logprobs()
