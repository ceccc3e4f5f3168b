"""Published architectures in plain ``torch.nn``, in torchvision's layout and with its names unless said otherwise.

Depths are the published ones, so that the batch norms are as many; widths are arguments, so that tests can be narrow.
"""
