"""Numbers, dates, money and signs written out as they are said."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nar_speech.text.spoken_chinese import speak_chinese
from nar_speech.text.spoken_english import speak_english


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It has 1,234 parts.", "It has one thousand two hundred thirty four parts."),
        ("3.14, 007 and -5", "three point one four, zero zero seven and minus five"),
        ("$3.50, $1.01, €5 and £1.25", "three dollars and fifty cents, one dollar and one cent,"
         " five euros and one pound and twenty five pence"),
        ("$0.50 $2.5M 3 billion €", "fifty cents two point five million dollars three billion euros"),
        ("USD 20, -$5, ¥300", "twenty dollars, minus five dollars, three hundred yen"),
        ("2024-03-05, 3/14/2021", "March fifth, twenty twenty four, March fourteenth, twenty twenty one"),
        ("25/12/2020", "December twenty fifth, twenty twenty"),
        ("Mar. 3, 1999 or 5 May", "March third, nineteen ninety nine or the fifth of May"),
        ("3:05 pm, 15:30, 12:00", "three oh five P M, fifteen thirty, twelve o'clock"),
        ("9 a.m. The end", "nine A M. The end"),
        ("25% of 20°C, -5 °F",
         "twenty five percent of twenty degrees Celsius, minus five degrees Fahrenheit"),
        ("1 kg, 3kg, 6 ft, 100 km/h, 10 m²",
         "one kilogram, three kilograms, six feet, one hundred kilometers per hour, ten square meters"),
        ("1990s, '80s", "nineteen nineties, eighties"),
        ("10-20 and 1990–1995", "ten to twenty and nineteen ninety to nineteen ninety five"),
        ("1/2, 3/4, 1 1/2, 24/7", "one half, three quarters, one and a half, twenty four seven"),
        ("21st and 100th", "twenty first and one hundredth"),
        ("Dr. Smith of St. Paul on Main St.", "Doctor Smith of Saint Paul on Main Street."),
        ("e.g. this, etc. And No. 5", "for example this, et cetera. And number five"),
        ("(555) 123-4567", "five five five, one two three, four five six seven"),
        ("a well-known — thing", "a well known, thing"),
        ("AT&T, 2+2=4, #1", "AT and T, two plus two equals four, number one"),
        ("foo@bar.org www.x.com", "foo at bar dot org w w w dot x dot com"),
        ("v1.2.3", "v one point two point three"),
        ("１２ and ٣٤ and ½", "twelve and thirty four and one half"),
        ("In 1905 2005 2010", "In nineteen oh five two thousand five twenty ten"),
        ("No numbers, here! \"Yes?\"", "No numbers, here! \"Yes?\""),
        ("", ""),
    ],
)  # fmt: skip
def test_english(text, said):
    assert speak_english(text) == said


@settings(max_examples=400, deadline=None)
@given(st.text() | st.text("0123456789.,:/-$€% stpmakKM°²½'()", max_size=40))
def test_no_digit_is_left(text):
    assert not any(character.isdecimal() for character in speak_english(text))


@pytest.mark.parametrize(
    "unit", ["1", "1,", "1.", "-", " ", "a@", "$", "1/", "1 ", "1:0", "a.b@c.", "www.", "x²", "Mr. "]
)
def test_time_is_linear_in_the_length(unit):
    def seconds(length):
        start = time.process_time()
        speak_english((unit * length)[:length])
        return time.process_time() - start

    assert seconds(20_000) < 40 * max(seconds(2_000), 0.01)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("一共3.5公斤", "一共三点五公斤"),
        ("25%", "百分之二十五"),
        ("2024年3月5日下午3:05", "二零二四年三月五日下午三点零五分"),
        ("￥30，$5", "三十元，五美元"),
        ("电话13812345678", "电话一三八一二三四五六七八"),
        ("1,234人", "一千二百三十四人"),
        ("3~5kg", "三到五公斤"),
        ("二〇二一", "二零二一"),
        ("１２", "十二"),
    ],
)
def test_chinese(text, said):
    pytest.importorskip("cn2an")
    assert speak_chinese(text) == said


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("0123456789.,:/-￥%年月日点 -~亿万k", max_size=40))
def test_no_digit_is_left_in_chinese(text):
    pytest.importorskip("cn2an")
    assert not any(character.isdecimal() for character in speak_chinese(text))
