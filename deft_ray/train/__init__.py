"""One trial on one worker group: slot, engine, evaluation, checkpoints. Knows no Tune and no MLflow."""
