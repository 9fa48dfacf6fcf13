"""lm-eval's tasks of this project; `lm_eval --include_path` takes this folder too."""
