"""`python -m fashiondpo_pipeline` is `fdpo`."""

from fashiondpo_pipeline.cli import main

main()
