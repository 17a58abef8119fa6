"""L5: settings that a run finds. Events in, decisions out; :mod:`.driver` acts on them, in a Trainer or in a loop."""
