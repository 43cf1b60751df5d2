"""What a teacher says, written down once and read in every epoch, by any number of processes.

``rows`` names rows by their contents; ``top_k``, ``sampled`` and ``hidden`` are what may be kept of a token;
``parts`` are the files; ``store`` is the folder of one cache; ``build`` fills it; ``faithful`` compares it
with the teacher; ``provider`` is where a trainer gets its signal.
"""
