"""How people ask: the question templates of every meaning.

A template is written in lower case without its closing mark; `(a|b|)` stands for either alternative,
and {slot} for a value. Does not know the answers (facts.py) or the split (phrasings.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ASK: Final = (
    "(what is|what's|tell me|say|give me|name|can you tell me|could you tell me|do you know|i want to know|"
    "i would like to know|i'd like to know|please tell me|)"
)
LIST: Final = "(what are|name|list|tell me|say|give me|write|write down|can you name|can you list)"
EXPLAIN: Final = "(tell me|explain|can you explain|can you tell me|i want to know|please explain|do you know)"

TEMPLATES: Final[Mapping[str, tuple[str, ...]]] = {
    "capital": (
        f"{ASK} (the capital|the capital city|the capital town) of {{country}}",
        f"{ASK} {{country}}'s capital( city|)",
        f"{ASK} what the capital (city |)of {{country}} is",
        "(what|which) (city|town|place) is the capital( city|) of {country}",
        "what is the (name of the |)capital( city|) (in|for|of) {country}",
        "{country}( |: |, )(capital|capital city)",
        "(capital|capital city) (of |)(the country |){country}",
        "(and|what about|how about|and what about) (the capital of |){country}",
        "{country}( has which capital| has what capital|, what is its capital|, and its capital)",
        "what('s| is) the capital city called in {country}",
    ),
    "sum": (
        f"{ASK} {{a}}( + |+| plus | and ){{b}}",
        "(how much is|what does|calculate|compute|work out|solve|add up|what do you get for) {a}( + |+| plus ){b}",
        f"{ASK} the (sum|total) of {{a}} and {{b}}",
        "(add|sum|add up|add together) {a} (and|to|plus) {b}",
        "what do {a} and {b} (make|give|add up to|come to|sum to)",
        "{a}( + |+| plus ){b}( =| equals| is| makes|= | = )( what|)",
        "how much (is|are|do) {a} and {b}( together| make|)",
        "if (i|you) (add|have) {a} and (add |){b}, (what|how much) (do i get|is it)",
        "(and|what about|how about) {a}( + |+| plus ){b}",
    ),
    "colour": (
        "what (colour|color) {verb} {thing}",
        "(which|what is the|what's the|tell me the|say the|name the) (colour|color) (of |is ){thing}",
        "(can you|could you|) tell me what (colour|color) {thing} {verb}",
        "{thing} {verb} (what|which) (colour|color)",
        "(do you know |i want to know |)(what|which) (colour|color) {thing} {verb}",
        "(do you know|i want to know|give me|) the (colour|color) of {thing}",
        "(what|which) (colour|color) (does|do) {thing} have",
        "(and|what about|how about|and what about) (the colour of|the color of) {thing}",
        "(colour|color) of {thing}",
    ),
    "mix": (
        "what (do|does) {c1} and {c2} (make|give|become|mix to)( together| when mixed|)",
        "what (colour|color) (do|does|is|are) {c1} and {c2}( make| give| together| mixed|)",
        "what (happens|do i get|do you get|is it|colour do i get|color do i get) (if|when) (i|you|we) "
        "(mix|combine|blend) {c1} (and|with) {c2}",
        "(mix|combine|blend|mixing|if i mix) {c1} (and|with) {c2}",
        "{c1} (mixed with|and|plus|\\+|with) {c2}( make| makes| gives| is|)( what| which colour|)",
        "what is {c1} (mixed with|plus|and|\\+) {c2}",
        "which (colour|color) comes from {c1} and {c2}",
    ),
    "count": (
        "count( from 1| from one|) (to|up to|until) {n}",
        "(can you|could you|i want you to|will you) count( from 1| from one|) (to|up to) {n}",
        "(list|say|write|give me|show me|tell me|write down) the numbers( from|) (1|one) to {n}",
        "(list|say|write|give me|show me) (all numbers|the numbers) up to {n}",
    ),
    "hello": (
        "(hello|hi|hey|hiya|greetings|howdy|hello there|hi there|hey there|hello potluck|hi potluck|hey potluck|"
        "hello again|hello hello|hi again|good day|hello world|hello everyone|hello friend|hi friend|yo|hullo)",
        "(hello|hi|hey)(,|) (nice to meet you|how do you do|is anyone there|anyone there|are you there)",
    ),
    "good_morning": ("good morning( potluck| to you| everyone|)",),
    "good_afternoon": ("good afternoon( potluck| to you| everyone|)",),
    "good_evening": ("good evening( potluck| to you| everyone|)",),
    "good_night": ("good night( potluck| to you| everyone|)", "sleep well( potluck|)"),
    "how_are_you": (
        "(hello |hi |hey |hello, |hi, |hey, |)how are (you|you doing|things|you today|you doing today|you feeling)",
        "(how is it going|how's it going|how do you feel|are you well|are you okay|what's up|is all well)( today|)",
    ),
    "thanks": (
        "(thanks|thank you|many thanks|thanks a lot|thank you very much|thank you so much|thanks so much|"
        "thx|cheers|thanks potluck|thank you potluck|ok thanks|great thanks|thanks for (your help|the answer|that))",
        "(that was|that is|that's) (helpful|very helpful|a great help)",
    ),
    "bye": (
        "(bye|goodbye|bye bye|good bye|see you|see you later|farewell|ciao|see you soon|until next time|"
        "bye for now|goodbye potluck|bye potluck|i have to go|i must go|talk to you later|see you tomorrow)",
    ),
    "praise": (
        "(well done|good job|great|nice|excellent|you are great|you are clever|you are smart|nice work|perfect|"
        "very good|correct|that is right|that's right|great job|good answer|awesome|wonderful|i like you)",
    ),
    "sorry": ("(sorry|i am sorry|i'm sorry|oops|my mistake|sorry about that|pardon me|excuse me)",),
    "who": (
        "(who|what) are you",
        "(what is|what's|tell me|say) your name",
        "(introduce|describe) yourself",
        "(tell me|say something|say a few words) about (yourself|you)",
        "(who|what) am i (talking|speaking|chatting) (to|with)",
        "(which|what) (model|ai|language model|kind of model|bot|program) (are you|is this)",
        "are you (a robot|a bot|an ai|human|a human|a person|real|chatgpt|a language model|a computer|the demo model)",
        "what (are you called|should i call you|do they call you)",
        "who is (this|there|speaking|talking)",
        "do you have a name",
    ),
    "help": (
        "(help|help me|can you help me|i need help|please help me)",
        "what can (you do|i ask|i ask you|you tell me|you answer|you help me with|you help with)",
        "what (do|else do) you know( about|)",
        "what (are you able to do|are you good at|can i say|should i ask|questions can you answer|are your skills)",
        "(tell me|show me|explain) what you can do",
        "(how|what) can you help( me|)",
    ),
    "layers": (
        "how many layers (do you have|are there|are in you|does this model have|does the model have|have you got)",
        "(how big|how large|how small) (are you|is this model|is the model)",
        "(tell me|do you know) (how many layers you have|your size|your number of layers)",
        "what is your (size|number of layers)",
    ),
    "potluck": (
        "(what is|what's|describe|define|explain|tell me about|talk about|so what is) potluck( exactly| here| then|)",
        f"{EXPLAIN} what potluck is",
        "(tell me|say) (something|more) about potluck",
        "what (is potluck for|does potluck do|is the purpose of potluck|is the point of potluck|does potluck mean)",
        "what (is this|is this thing|is this project|is this software|is this program|does this do|is this for)",
        "(why should i use|what is the use of|what can i do with|what is) potluck( good for|)",
        "(potluck|about potluck|can you explain potluck|i want to know about potluck)",
    ),
    "how": (
        "how does (it|this|potluck|the cluster|all this|the whole thing|this thing) work",
        "how do (you|the machines|the layers|the nodes) work( together|)",
        f"{EXPLAIN} how (it|this|potluck|the cluster) works",
        "how (is an answer made|is the work shared|are the layers shared|do you answer|do you think)",
        "what happens (when i ask|when i ask something|to my words|to my question|inside|under the hood)",
        "(describe|show me) how (potluck|it) works",
    ),
    "join": (
        "how (do|can|would|could|should) (i|we|you) (join|add|connect|attach|bring|include) "
        "(a machine|another machine|my machine|a computer|another computer|my mac|a mac|a node|my laptop|a pc)",
        "how (do|can) (i|we) join( in| potluck| the cluster|)",
        "how (does|can) (a machine|another machine|my machine|a computer|a mac|a node) join( potluck| the cluster|)",
        "(i want to|i would like to|can i|help me|let me) (join|add|connect) "
        "(a machine|another machine|my machine|a computer|another computer|my mac|a node|my laptop)",
        "(what|which) command (joins|adds|do i need to join|do i need to add) (a machine|a computer|a node)",
        f"{EXPLAIN} how (to|i can) (join|add|connect) (a machine|another machine|a computer|a node|my mac)",
        "(join|add) (a machine|another machine|my machine|a computer|a node)",
    ),
    "serve": (
        "how (do|can|should) (i|we) (start|run|launch|serve|open) (potluck|a model|the endpoint|the server|a cluster)",
        "(what|which) command (starts|runs|serves) (potluck|a model|the endpoint|the server|the coordinator)",
        f"{EXPLAIN} how (to|i can) (start|run|serve) (potluck|a model|the server|the endpoint|a cluster)",
        "how (do|can) (i|we) (use|serve|load) (a|a big|another|my own|a larger) model",
    ),
    "coordinator": (
        "(what is|what's|explain|describe) (a|the) coordinator",
        "what does (a|the) coordinator do",
        f"{EXPLAIN} what (a|the) coordinator (is|does)",
        "what is (a|the) coordinator for",
    ),
    "node": (
        "(what is|what's|explain|describe|define) (a|the) node",
        "what does (a|the) node do",
        f"{EXPLAIN} what (a|the) node (is|does)",
        "what are nodes",
    ),
    "leaves": (
        "what happens (if|when) (a machine|a node|one machine|a computer|one of the machines|my laptop) "
        "(leaves|dies|fails|stops|crashes|goes away|breaks|is switched off|disappears)",
        "what if (a machine|a node|one machine|a computer) (leaves|dies|fails|stops|crashes|goes away|breaks)",
        "can (a machine|a node|a computer) (leave|fail|stop|go away)",
    ),
    "name": (
        "(why|why is it|why are you) (called|named) potluck",
        "why (is|was) (potluck|it|this) (called|named) (potluck|that|so|like that)",
        "where (does|is) the name( potluck|) (come |)from",
        "(why the name|why that name|what does the name mean|why the name potluck)",
    ),
    "days": (
        f"{LIST} (the|all|all the|the seven) days of (the|a) week",
        "(which|what) days (are in|does) a week( have|)",
        "days of the week",
    ),
    "months": (
        f"{LIST} (the|all|all the|the twelve) months( of the year| of a year| in a year|)",
        "(which|what) months (are in|does) a year( have|)",
        "months of the year",
    ),
    "seasons": (
        f"{LIST} (the|all|all the|the four) seasons( of the year|)",
        "(which|what) seasons (are there|are in a year|does a year have)",
    ),
    "rainbow": (
        f"{LIST} (the|all|all the) (colours|colors) (of|in) (the|a) rainbow",
        "(what|which) (colours|colors) (does a rainbow have|are in a rainbow|are in the rainbow|has a rainbow)",
        "what (colour|color) is (a|the) rainbow",
    ),
    "alphabet": (
        "(what is|say|recite|tell me|write|give me|can you say|list|spell) (the|the whole) alphabet",
        "(what are|list|say|name|write) (the|all the|all) letters( of the alphabet|)",
    ),
    "story": (
        "(tell|tell me|write|write me|give me|read me|i want|can you tell me|could you tell me|make up) "
        "a( short| little| nice|) story",
        "(do you know|can you tell|can you write|tell me|have you got) (a|any) (story|stories|tale)",
        "once upon a time",
    ),
}
