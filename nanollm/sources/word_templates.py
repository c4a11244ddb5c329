"""The stories that the generated word problems tell, and the steps that solve them.

Letters: a b c d numbers from 2 to `largest`; j k counts, multipliers and divisors from 2 to 9; p a number up to the
largest that a problem may hold. {t=a*k} in a question is a number that is worked out first, so that a division has no
rest; [x=a+b] in a step becomes 7+5=<<7+5=12>>12. One step has one sum, so the level of a template is its steps.
"""

from dataclasses import dataclass

PEOPLE = (
    ("Mia", "she"),
    ("Tom", "he"),
    ("Anna", "she"),
    ("Ben", "he"),
    ("Lucy", "she"),
    ("Sam", "he"),
    ("Emma", "she"),
    ("Max", "he"),
    ("Rosa", "she"),
    ("Leo", "he"),
    ("Jane", "she"),
    ("Paul", "he"),
)
ITEMS = ("apple", "book", "pen", "card", "coin", "cup", "ball", "shell", "stamp", "cookie", "toy", "egg")
BOXES = ("boxes", "bags", "baskets", "jars")


@dataclass(frozen=True)
class Template:
    """A story with slots, and its worked solution."""

    question: str
    steps: tuple[str, ...]
    heldout: bool = False  # in no other split, so that a new story can be asked


TEMPLATES = (
    # --- one step ---
    Template(
        "{name} has {a} {items}. {other} gives {him} {b} more. How many {items} does {name} have now?",
        ("{name} has [x=a+b] {items} now.",),
    ),
    Template(
        "{name} had {a} {items} and gave {b} of them to {other}. How many {items} does {name} have left?",
        ("{name} has [x=a-b] {items} left.",),
    ),
    Template(
        "{name} has {k} {boxes} with {a} {items} in each. How many {items} does {he} have in all?",
        ("{name} has [x=k*a] {items} in all.",),
    ),
    Template(
        "{name} shares {t=a*k} {items} equally among {k} friends. How many {items} does each friend get?",
        ("Each friend gets [x=t/k] {items}.",),
    ),
    Template(
        "{name} has {a} {items}. {other} has {b} more {items} than {name}. How many {items} does {other} have?",
        ("{other} has [x=a+b] {items}.",),
    ),
    Template(
        "{name} has {a} {items}. {other} has {b} fewer {items} than {name}. How many {items} does {other} have?",
        ("{other} has [x=a-b] {items}.",),
    ),
    Template(
        "{name} has {a} {items}. {other} has {k} times as many. How many {items} does {other} have?",
        ("{other} has [x=a*k] {items}.",),
    ),
    Template(
        "{name} buys {k} {items} for ${a} each. How many dollars does {he} pay?",
        ("{name} pays [x=k*a] dollars.",),
    ),
    Template(
        "{name} is {a} years old. {other} is {b} years older than {name}. How old is {other}?",
        ("{other} is [x=a+b] years old.",),
    ),
    Template(
        "{name} had ${a} and spent ${b} of it at the shop. How many dollars does {name} have left?",
        ("{name} has [x=a-b] dollars left.",),
    ),
    Template(
        "{name} walks {a} miles each day. How many miles does {he} walk in {k} days?",
        ("{name} walks [x=a*k] miles.",),
    ),
    Template(
        "{name} reads {t=a*k} pages in {k} days, the same number each day. How many pages does {he} read in a day?",
        ("{name} reads [x=t/k] pages in a day.",),
    ),
    Template(
        "{name} sees {a} birds in the morning and {b} birds in the evening. How many birds does {name} see that day?",
        ("{name} sees [x=a+b] birds.",),
        heldout=True,
    ),
    Template(
        "A box holds {a} {items}. {name} takes {b} {items} out of it. How many {items} are still in the box?",
        ("The box holds [x=a-b] {items}.",),
        heldout=True,
    ),
    Template(
        "The garden of {name} has {k} rows of {a} trees. How many trees does the garden have?",
        ("The garden has [x=k*a] trees.",),
        heldout=True,
    ),
    Template(
        "{name} puts {t=a*k} plates on {k} tables, the same number on each. How many plates are on a table?",
        ("On a table are [x=t/k] plates.",),
        heldout=True,
    ),
    # --- two steps ---
    Template(
        "{name} has {a} {items}. {He} buys {b} more and then gives {c} to {other}. "
        "How many {items} does {name} have now?",
        ("{name} has [x=a+b] {items} after buying.", "Then {he} has [y=x-c] {items} left."),
    ),
    Template(
        "{name} has {k} {boxes} with {a} {items} in each and {b} more {items} on the table. "
        "How many {items} does {name} have in all?",
        ("The {boxes} hold [x=k*a] {items}.", "In all {name} has [y=x+b] {items}."),
    ),
    Template(
        "{name} buys {k} {items} for ${a} each. {He} pays with ${p}. How many dollars does {he} get back?",
        ("The {items} cost [x=k*a] dollars.", "{name} gets [y=p-x] dollars back."),
    ),
    Template(
        "{name} has {a} {items}. {other} has {b} more {items} than {name}. "
        "How many {items} do {name} and {other} have together?",
        ("{other} has [x=a+b] {items}.", "Together they have [y=a+x] {items}."),
    ),
    Template(
        "{name} has {a} {items}. {other} has {k} times as many {items} as {name}. "
        "How many {items} do they have together?",
        ("{other} has [x=a*k] {items}.", "Together they have [y=a+x] {items}."),
    ),
    Template(
        "{name} has {a} {items}. {other} has {b} fewer {items} than {name}. How many {items} do both of them have?",
        ("{other} has [x=a-b] {items}.", "Both of them have [y=a+x] {items}."),
    ),
    Template(
        "{name} finds {a} {items} and {other} finds {b}. They share them equally among {k} friends. "
        "How many {items} does each friend get?",
        ("They find [x=a+b] {items}.", "Each friend gets [y=x/k] {items}."),
    ),
    Template(
        "{name} had {p} {items} and lost {b} of them. {He} puts the rest into {k} {boxes}, the same number in each. "
        "How many {items} are in each?",
        ("{name} has [x=p-b] {items} left.", "Each holds [y=x/k] {items}."),
    ),
    Template(
        "{name} works {k} hours and earns ${a} an hour. Then {he} spends ${b}. How many dollars does {name} have left?",
        ("{name} earns [x=k*a] dollars.", "{He} has [y=x-b] dollars left."),
    ),
    Template(
        "{name} reads {a} pages a day for {k} days. The book has {p} pages. How many pages are left to read?",
        ("{name} reads [x=a*k] pages.", "There are [y=p-x] pages left."),
    ),
    Template(
        "{name} is {a} years old. {other} is twice as old as {name}. How old will {other} be in {b} years?",
        ("{other} is [x=a*2] years old now.", "In {b} years {other} will be [y=x+b] years old."),
    ),
    Template(
        "{name} is {a} years old. {other} is {b} years younger than {name}. How old will {other} be in {c} years?",
        ("{other} is [x=a-b] years old now.", "In {c} years {other} will be [y=x+c] years old."),
    ),
    Template(
        "{name} runs {a} miles a day for {k} days and then {b} miles on Sunday. How many miles does {name} run in all?",
        ("{name} runs [x=a*k] miles before Sunday.", "In all {he} runs [y=x+b] miles."),
    ),
    Template(
        "{name} has {a} red {items} and {b} blue {items}. {c} of all these {items} are broken. "
        "How many {items} are not broken?",
        ("{name} has [x=a+b] {items}.", "Not broken are [y=x-c] {items}."),
    ),
    Template(
        "{name} has {a} {items} and finds {b} more. {other} has {c} {items}. "
        "How many more {items} does {name} have than {other}?",
        ("{name} has [x=a+b] {items}.", "That is [y=x-c] {items} more than {other}."),
    ),
    Template(
        "{name} puts {t=a*k} {items} into {k} {boxes}, the same number in each. Then {he} adds {b} {items} to each. "
        "How many {items} does each hold now?",
        ("At first each holds [x=t/k] {items}.", "Now each holds [y=x+b] {items}."),
    ),
    Template(
        "{name} pays ${t=a*k} for {k} {items}. All cost the same. How many dollars would {he} pay for {j} {items}?",
        ("One costs [x=t/k] dollars.", "For {j} {items} {he} would pay [y=x*j] dollars."),
    ),
    Template(
        "{name} sells {a} {items} on Monday and twice as many on Tuesday. "
        "How many {items} does {he} sell on both days together?",
        ("On Tuesday {name} sells [x=a*2] {items}.", "Together {he} sells [y=a+x] {items}."),
    ),
    Template(
        "A shop has {a} {items}. It sells {b} of them and then gets {c} new ones. How many {items} does the shop have?",
        ("After selling there are [x=a-b] {items}.", "Then there are [y=x+c] {items}."),
        heldout=True,
    ),
    Template(
        "A hall has {k} rows with {a} chairs in each row. People sit on {b} of the chairs. How many chairs are free?",
        ("The hall has [x=k*a] chairs.", "There are [y=x-b] free chairs."),
        heldout=True,
    ),
    Template(
        "A class has {a} girls and {b} boys. The teacher makes {k} teams of the same size. "
        "How many children are in each team?",
        ("The class has [x=a+b] children.", "Each team has [y=x/k] children."),
        heldout=True,
    ),
    Template(
        "A red rope is {a} feet long. A blue rope is {b} feet longer than the red one. "
        "How many feet long are both ropes together?",
        ("The blue rope is [x=a+b] feet long.", "Together they are [y=a+x] feet long."),
        heldout=True,
    ),
    Template(
        "A cook needs {a} eggs for each cake and bakes {k} cakes. He also needs {b} eggs for a soup. "
        "How many eggs does he need?",
        ("The cakes need [x=a*k] eggs.", "In all he needs [y=x+b] eggs."),
        heldout=True,
    ),
    Template(
        "A machine makes {t=a*k} {items} in {k} hours, the same number each hour. "
        "How many {items} does it make in {j} hours?",
        ("In one hour it makes [x=t/k] {items}.", "In {j} hours it makes [y=x*j] {items}."),
        heldout=True,
    ),
    # --- three steps ---
    Template(
        "{name} has {a} {items}. {other} has {k} times as many. They put all of them together and then give {b} away. "
        "How many {items} are left?",
        (
            "{other} has [x=a*k] {items}.",
            "Together they have [y=a+x] {items}.",
            "After giving there are [z=y-b] {items} left.",
        ),
    ),
    Template(
        "{name} buys {k} {items} for ${a} each and {j} {things} for ${b} each. How many dollars does {he} pay in all?",
        (
            "The {items} cost [x=k*a] dollars.",
            "The {things} cost [y=j*b] dollars.",
            "In all {name} pays [z=x+y] dollars.",
        ),
    ),
    Template(
        "{name} finds {a} {items} and then {b} more. {He} gives {c} to {other} and shares the rest equally among "
        "{k} friends. How many {items} does each friend get?",
        ("{name} finds [x=a+b] {items}.", "{He} has [y=x-c] {items} left.", "Each friend gets [z=y/k] {items}."),
    ),
    Template(
        "{name} works {k} days and earns ${a} a day. {He} spends ${b} on food and ${c} on a game. "
        "How many dollars does {name} have left?",
        (
            "{name} earns [x=k*a] dollars.",
            "After the food {he} has [y=x-b] dollars.",
            "After the game {he} has [z=y-c] dollars left.",
        ),
    ),
    Template(
        "{name} is {a} years old. {other} is twice as old as {name}. {third} is {b} years younger than {other}. "
        "How old are {name} and {third} together?",
        (
            "{other} is [x=a*2] years old.",
            "{third} is [y=x-b] years old.",
            "{name} and {third} are [z=a+y] years old together.",
        ),
    ),
    Template(
        "{name} drives {a} miles an hour for {k} hours and then {b} miles more. The whole trip is {p} miles. "
        "How many miles are left?",
        ("First {name} drives [x=a*k] miles.", "Then {he} has driven [y=x+b] miles.", "There are [z=p-y] miles left."),
    ),
    Template(
        "{name} has {k} {boxes} with {a} {items} in each. {He} keeps {b} {items} and shares the rest equally among "
        "{j} friends. How many {items} does each friend get?",
        (
            "{name} has [x=k*a] {items}.",
            "There are [y=x-b] {items} to share.",
            "Each friend gets [z=y/j] {items}.",
        ),
    ),
    Template(
        "{name} has {a} {items}. {other} has {b} more than {name}. {third} has {c} fewer than {other}. "
        "How many {items} do {name} and {third} have together?",
        (
            "{other} has [x=a+b] {items}.",
            "{third} has [y=x-c] {items}.",
            "{name} and {third} have [z=a+y] {items} together.",
        ),
    ),
    Template(
        "{name} reads {a} pages on Monday and twice as many on Tuesday. The book has {p} pages. "
        "How many pages are left to read?",
        (
            "On Tuesday {name} reads [x=a*2] pages.",
            "On both days {he} reads [y=a+x] pages.",
            "There are [z=p-y] pages left.",
        ),
    ),
    Template(
        "A baker makes {k} trays with {a} rolls on each. He sells {b} rolls and then bakes {c} new ones. "
        "How many rolls does he have now?",
        ("He makes [x=k*a] rolls.", "After selling he has [y=x-b] rolls.", "Now he has [z=y+c] rolls."),
        heldout=True,
    ),
    Template(
        "A school buys {k} balls for ${a} each and {j} nets for ${b} each. "
        "How many dollars more do the balls cost than the nets?",
        ("The balls cost [x=k*a] dollars.", "The nets cost [y=j*b] dollars.", "The balls cost [z=x-y] dollars more."),
        heldout=True,
    ),
    Template(
        "A farm has {a} cows and {b} more sheep than cows. All these animals live in {k} barns, the same number in "
        "each. How many animals live in a barn?",
        ("The farm has [x=a+b] sheep.", "It has [y=a+x] animals.", "In a barn live [z=y/k] animals."),
        heldout=True,
    ),
    # --- four steps ---
    Template(
        "{name} buys {k} {items} for ${a} each and {j} {things} for ${b} each. {He} pays with ${p}. "
        "How many dollars does {he} get back?",
        (
            "The {items} cost [x=k*a] dollars.",
            "The {things} cost [y=j*b] dollars.",
            "In all they cost [z=x+y] dollars.",
            "{name} gets [w=p-z] dollars back.",
        ),
    ),
    Template(
        "{name} has {a} {items}. {other} has {b} more than {name}. {third} has twice as many as {other}. "
        "How many {items} do the three have together?",
        (
            "{other} has [x=a+b] {items}.",
            "{third} has [y=x*2] {items}.",
            "{name} and {other} have [z=a+x] {items}.",
            "Together the three have [w=z+y] {items}.",
        ),
    ),
    Template(
        "{name} works {k} hours for ${a} an hour and then {j} hours for ${b} an hour. {He} spends ${c}. "
        "How many dollars does {name} have left?",
        (
            "First {name} earns [x=k*a] dollars.",
            "Then {he} earns [y=j*b] dollars.",
            "In all {he} earns [z=x+y] dollars.",
            "{He} has [w=z-c] dollars left.",
        ),
    ),
    Template(
        "{name} has {k} {boxes} with {a} {items} in each. {He} gives {b} {items} to {other}, finds {c} and shares all "
        "{he} has equally among {j} friends. How many {items} does each friend get?",
        (
            "{name} has [x=k*a] {items}.",
            "After giving {he} has [y=x-b] {items}.",
            "After finding {he} has [z=y+c] {items}.",
            "Each friend gets [w=z/j] {items}.",
        ),
    ),
    Template(
        "{name} is {a} years old. {other} is {b} years older than {name}. {third} is {c} years younger than {other}. "
        "How old are the three together?",
        (
            "{other} is [x=a+b] years old.",
            "{third} is [y=x-c] years old.",
            "{name} and {other} are [z=a+x] years old.",
            "Together the three are [w=z+y] years old.",
        ),
    ),
    Template(
        "{name} runs {a} miles a day for {k} days and then {c} miles on Sunday. {other} runs {b} miles a day for "
        "{j} days. How many miles more does {name} run than {other}?",
        (
            "{name} runs [x=a*k] miles before Sunday.",
            "In all {he} runs [y=x+c] miles.",
            "{other} runs [z=b*j] miles.",
            "{name} runs [w=y-z] miles more.",
        ),
    ),
    Template(
        "A shop sells {k} {items} for ${a} each and {j} {things} for ${b} each. It pays ${c} for the room. "
        "How many dollars does the shop keep?",
        (
            "The {items} bring [x=k*a] dollars.",
            "The {things} bring [y=j*b] dollars.",
            "Together they bring [z=x+y] dollars.",
            "The shop keeps [w=z-c] dollars.",
        ),
        heldout=True,
    ),
    Template(
        "A train has {a} people. {b} get on and {c} get off. In the city the number of people doubles, and then "
        "{d} get off. How many people are on the train?",
        (
            "After the first stop there are [x=a+b] people.",
            "Then there are [y=x-c] people.",
            "In the city there are [z=y*2] people.",
            "At the end there are [w=z-d] people.",
        ),
        heldout=True,
    ),
)
