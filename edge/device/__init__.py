"""The memory and the cores of this device, and how fast both are.

    memory.py   the memory that is available, and the memory that this process has
    cores.py    which cores help, and how many threads to run
    machine.py  how fast memory is read and integers are multiplied here
    budget.py   the parts of memory that both engines count

Each imports from those above it.
"""
