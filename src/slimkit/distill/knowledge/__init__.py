"""Teachers that live anywhere: knowledge in files, or from a server, by the numbers of samples.

A teacher writes what it knows to files, or answers over the network; a student reads one or
several of them through one iterator::

    teacher = NetworkTeacher(network, training_samples(splits))
    dump(teacher, "knowledge")                                  # offline
    server = serve(teacher, port=5005)                          # online

    with Knowledge(["file:knowledge", "grpc://127.0.0.1:5005"], merge="mean") as knowledge:
        term = KnowledgeDistiller(student, knowledge, [KD()], splits.train)
        fit(student, splits.train, losses=[term], ...)
"""

from __future__ import annotations

from slimkit.distill.knowledge.distilling import KnowledgeDistiller
from slimkit.distill.knowledge.dumping import dump
from slimkit.distill.knowledge.format.question import Question
from slimkit.distill.knowledge.format.schema import KeySpec, KnowledgeSchema
from slimkit.distill.knowledge.mixing import Knowledge
from slimkit.distill.knowledge.online.connecting import Patience, Trust
from slimkit.distill.knowledge.online.fetching import Source
from slimkit.distill.knowledge.online.pooling import TeacherPool, ray_pool
from slimkit.distill.knowledge.online.serving import TeacherServer, TLSFiles, serve
from slimkit.distill.knowledge.online.source import OnlineTeacher
from slimkit.distill.knowledge.online.tokens import issue_token
from slimkit.distill.knowledge.reading import KnowledgeFiles
from slimkit.distill.knowledge.teaching import NetworkTeacher, Samples, Teacher

__all__ = [
    "KeySpec",
    "Knowledge",
    "KnowledgeDistiller",
    "KnowledgeFiles",
    "KnowledgeSchema",
    "NetworkTeacher",
    "OnlineTeacher",
    "Patience",
    "Question",
    "Samples",
    "Source",
    "TLSFiles",
    "Teacher",
    "TeacherPool",
    "TeacherServer",
    "Trust",
    "dump",
    "issue_token",
    "ray_pool",
    "serve",
]
