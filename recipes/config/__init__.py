"""The typed configs of the recipes, and what Hydra needs beside them."""
