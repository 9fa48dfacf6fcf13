"""This project's tasks for lm-eval; `lm_eval --include_path` accepts this folder, too."""
