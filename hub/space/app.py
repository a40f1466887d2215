"""The page as a Hugging Face Space: what `timm-ham demo` serves."""

from timm_ham.inspection.demo import launch_demo

launch_demo()
