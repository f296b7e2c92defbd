"""Articles and cleaning, on lines written as WikiText writes them."""

import pytest

from llamajax.corpus.wikitext import articles, clean

FILE = """ \n = Robert <unk> = \n \n Robert is an actor . \n \n = = Career = = \n
 \n In 2000 . \n = = = 2001 – 2003 = = = \n \n = x = \n \n Formula : \n = 4 = \n
 \n = Homarus = \n \n A lobster . \n"""


def test_articles_start_at_titles_after_a_blank_line():
    lines = FILE.splitlines(keepends=True)
    found = list(articles(lines))
    assert "".join(found) == FILE
    titles = [a.split("\n")[0] for a in found]
    assert titles == [" ", " = Robert <unk> = ", " = x = ", " = Homarus = "]
    assert " = = Career = = " in found[1]
    assert " = 4 = " in found[2]


@pytest.mark.parametrize(
    ("raw", "typed"),
    [
        ("a guest @-@ starring role", "a guest-starring role"),
        ("1 @,@ 234 @.@ 5 people", "1,234.5 people"),
        ("pop @-@ up @-@ book", "pop-up-book"),
        ("Yes , no ; maybe : so ! What ? End .", "Yes, no; maybe: so! What? End."),
        ("about ( roughly 5 % ) of [ sic ] it", "about (roughly 5%) of [sic] it"),
        ('the play " Herons " , and " Doctors " .', 'the play "Herons", and "Doctors".'),
        ('( " quoted " )', '("quoted")'),
        ('an odd " mark', 'an odd " mark'),
        ("the critics ' favourite", "the critics' favourite"),
        ("it 's what they 'd said , don 't they", "it's what they'd said, don't they"),
        ("they did n't", "they didn't"),
        ("$ 5 and £ 6 @.@ 50 , # 1", "$5 and £6.50, #1"),
        ("a <unk> , b", "a <unk>, b"),
        ("Senjō no Valkyria 3 : <unk> Chronicles", "Senjō no Valkyria 3: <unk> Chronicles"),
        ("x = y", "x = y"),
        ("an en – dash and / slash", "an en – dash and / slash"),
    ],
)
def test_cleaning_a_paragraph(raw, typed):
    assert clean(f" {raw} \n") == typed + "\n"


def test_headings_and_blocks_are_kept():
    raw = ' = The " X " = \n \n First . \n Second . \n \n \n'
    raw += " = = A , b = = \n \n = = = C = = = \n d \n"
    expected = '= The "X" =\n\nFirst.\nSecond.\n\n== A, b ==\n\n=== C ===\nd\n'
    assert clean(raw) == expected
