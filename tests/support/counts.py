"""What has been counted: reads a storage's instruments, or what a scrape returned."""


def _samples(source):
    if hasattr(source, "samples"):  # the `zeoserver.Figures` of a scrape
        return source.samples
    return [sample for instrument in source.instruments for family in instrument.collect() for sample in family.samples]


def figures(source):
    """(name, (label, value), ...) -> value, for every series of a `Metrics` or of a scrape, without the storage."""
    return {
        (sample.name, *sorted(label for label in sample.labels.items() if label[0] != "storage")): sample.value
        for sample in _samples(source)
        if not sample.name.endswith("_created")
    }


def value(source, name, **labels):
    """The value of one series; KeyError if there is no such series."""
    return figures(source)[(name, *sorted(labels.items()))]


def nonzero(source, name):
    """The series of one name that are not 0: the value of the label, or a tuple if there are several -> value."""
    found = {}
    for (series, *labels), number in figures(source).items():
        if series == name and number:
            values = tuple(value for _, value in labels)
            found[values[0] if len(values) == 1 else values] = number
    return found
