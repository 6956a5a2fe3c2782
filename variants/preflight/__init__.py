"""What a variant must show on synthetic data before anything expensive starts.

check       the list of what is checked, in its order
contract    what encode, decode and the hooks take and give
learning    what the training steps have shown
evidence    what one loss on a copy tells
saved       what is saved is all that the SAE needs
identical   the change has an effect
machine     what fails on a GPU, and the memory of a step at the real sizes (memory: how that is found)
report      the variant's own report
trial       reading, building and training a variant on synthetic data
messages    the words, and the line of the user's file
budget      whether the whole run fits the machine
"""
