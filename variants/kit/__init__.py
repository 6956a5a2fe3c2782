"""What the program does with a variant besides what the variant itself says (variants/base.py).

mathematics that variants call   losses, precision, sparse, topk, decoder, scale, revival
a training step                  steps, contexts (whole contexts and attention), ranks (several processes)
a trained SAE                    trained, saving, interchange (SAEs made elsewhere: found, saelens, dictionary_learning)
the imperative form              imperative, trainers, trainer_state, compat
small tools                      hyper (--hyper, --sweep), copying, files
"""
