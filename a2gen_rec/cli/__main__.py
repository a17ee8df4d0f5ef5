"""``python -m a2gen_rec.cli``: the module that torchrun starts on every rank."""

from a2gen_rec.cli.main import main

if __name__ == "__main__":
    main()
