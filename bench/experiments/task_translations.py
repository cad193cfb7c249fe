"""Short sentences and their English, written for this project; wrong ones differ by a word or two."""

from __future__ import annotations

# language -> the pairs that are shown first
SHOWN = {
    "French": (("Le train part à midi.", "The train leaves at noon."), ("J'ai deux frères.", "I have two brothers.")),
    "Spanish": (
        ("El tren sale al mediodía.", "The train leaves at noon."),
        ("Tengo dos hermanos.", "I have two brothers."),
    ),
}

_FRENCH = """
Le chat dort sur le lit. = The cat sleeps on the bed.
    The dog sleeps on the bed. / The cat eats on the bed. / The cat sleeps under the table.
Elle a trois enfants. = She has three children.
    She has five children. / He has three children. / She has three horses.
Nous mangeons du pain. = We eat bread.
    We eat fish. / We sell bread. / They buy bread.
La maison est grande. = The house is big.
    The house is small. / The car is big. / The house is old.
Il fait froid aujourd'hui. = It is cold today.
    It is hot today. / It was cold yesterday. / It is raining today.
Mon père travaille à Paris. = My father works in Paris.
    My mother works in Paris. / My father sleeps in Paris. / My brother works in Rome.
Je bois un verre d'eau. = I drink a glass of water.
    I drink a glass of milk. / I break a glass of wine. / I drink a cup of tea.
Les enfants jouent dans le jardin. = The children play in the garden.
    The children play in the kitchen. / The children sleep in the garden. / The women play in the garden.
Demain, nous irons à la mer. = Tomorrow we will go to the sea.
    Yesterday we went to the sea. / Tomorrow we will go to the mountains. / Tomorrow they will come from the sea.
Le livre est sur la table. = The book is on the table.
    The book is under the table. / The knife is on the table. / The book is on the chair.
Où est la gare ? = Where is the station?
    When is the train? / Where is the church? / Who is the teacher?
Ma soeur lit une lettre. = My sister reads a letter.
    My sister writes a book. / My brother reads a letter. / My sister burns a letter.
Le médecin est en retard. = The doctor is late.
    The doctor is early. / The baker is late. / The doctor is ill.
Elle achète des pommes rouges. = She buys red apples.
    She buys green apples. / She eats red cherries. / She sells red apples.
Le vieil homme marche lentement. = The old man walks slowly.
    The young man walks slowly. / The old man walks quickly. / The old woman talks slowly.
Il y a sept jours dans une semaine. = There are seven days in a week.
    There are twelve months in a year. / There are seven men in a boat. / There are six days in a month.
Je n'aime pas le fromage. = I do not like cheese.
    I like cheese very much. / I do not like meat. / He does not like cheese.
La porte est fermée. = The door is closed.
    The door is open. / The window is closed. / The door is broken.
Ils ont perdu leurs clés. = They have lost their keys.
    They have found their keys. / They have lost their shoes. / We have lost our keys.
Le soleil brille. = The sun is shining.
    The moon is shining. / The sun is setting. / The wind is blowing.
Mon ami parle quatre langues. = My friend speaks four languages.
    My friend speaks two languages. / My friend has four houses. / My uncle speaks four languages.
Elle porte une robe noire. = She is wearing a black dress.
    She is wearing a white dress. / She is wearing a black hat. / She is washing a yellow dress.
Le boulanger se lève tôt. = The baker gets up early.
    The baker gets up late. / The farmer gets up early. / The baker goes to bed early.
Nous cherchons un hôtel. = We are looking for a hotel.
    We are leaving the hotel. / We are looking for a school. / They are building a hotel.
L'oiseau chante dans l'arbre. = The bird sings in the tree.
    The bird sleeps in the tree. / The bird sings in the cage. / The girl sings in the street.
J'ai oublié mon parapluie. = I forgot my umbrella.
    I found my umbrella. / I forgot my suitcase. / You forgot your umbrella.
La reine est morte hier. = The queen died yesterday.
    The king died yesterday. / The queen was born yesterday. / The queen will die tomorrow.
Le couteau est dans la cuisine. = The knife is in the kitchen.
    The spoon is in the kitchen. / The knife is in the bathroom. / The cook is in the kitchen.
Ce vin est trop cher. = This wine is too expensive.
    This wine is too sweet. / This bread is too expensive. / This wine is very cheap.
Mes voisins ont un cheval blanc. = My neighbours have a white horse.
    My neighbours have a black horse. / My cousins have a white horse. / My neighbours have a white goat.
Le facteur apporte une lettre. = The postman brings a letter.
    The postman brings a parcel. / The butcher brings a letter. / The postman reads a letter.
Elle écrit avec la main gauche. = She writes with her left hand.
    She writes with her right hand. / She waves with her left hand. / She walks with her left foot.
L'hiver, il neige souvent ici. = In winter it often snows here.
    In summer it often rains here. / In winter it never snows here. / In winter it often rains there.
Je voudrais une chambre calme. = I would like a quiet room.
    I would like a large room. / I would like a quiet life. / I have a noisy room.
Il a vendu sa voiture. = He sold his car.
    He bought a car. / He sold his house. / He washed his car.
La bibliothèque ouvre à neuf heures. = The library opens at nine o'clock.
    The library closes at nine o'clock. / The library opens at ten o'clock. / The bakery opens at nine o'clock.
Ma grand-mère fait de la confiture. = My grandmother makes jam.
    My grandmother makes butter. / My grandfather makes jam. / My grandmother eats cake.
Les étoiles sont belles ce soir. = The stars are beautiful tonight.
    The flowers are beautiful tonight. / The stars are beautiful every morning. / The stars are hidden tonight.
Tourne à droite après le pont. = Turn right after the bridge.
    Turn left after the bridge. / Turn right after the church. / Turn right before the bridge.
Le roi avait une fille. = The king had a daughter.
    The king had a son. / The queen had a daughter. / The king had a castle.
Il pleut depuis lundi. = It has been raining since Monday.
    It has been snowing since Monday. / It has been raining since Friday. / It stopped raining on Monday.
Cette rue est dangereuse la nuit. = This street is dangerous at night.
    This street is dangerous in the morning. / This street is quiet at night. / This river is dangerous at night.
Je t'attends devant le cinéma. = I am waiting for you in front of the cinema.
    I am waiting for you behind the cinema. / I am waiting for you in front of the school. / I saw you in the cinema.
Le lait est dans le réfrigérateur. = The milk is in the fridge.
    The butter is in the fridge. / The milk is in the bottle. / The milk is on the table.
Elle ne répond jamais au téléphone. = She never answers the phone.
    She always answers the phone. / She never answers letters. / He never uses the phone.
Le juge a posé une question. = The judge asked a question.
    The judge gave an answer. / The thief asked a question. / The judge told a story.
Les feuilles tombent en automne. = The leaves fall in autumn.
    The leaves grow in spring. / The leaves fall in winter. / The apples fall in autumn.
Mon chien a peur des chats. = My dog is afraid of cats.
    My dog is fond of cats. / My cat is afraid of dogs. / My dog is afraid of thunder.
Nous avons dormi sous une tente. = We slept in a tent.
    We slept in a boat. / We ate in a tent. / They slept in a barn.
Le pêcheur répare son bateau. = The fisherman repairs his boat.
    The fisherman sells his boat. / The fisherman repairs his net. / The carpenter repairs his roof.
"""

_SPANISH = """
El perro duerme en la cocina. = The dog sleeps in the kitchen.
    The cat sleeps in the kitchen. / The dog eats in the kitchen. / The dog sleeps in the garden.
Ella tiene cuatro gatos. = She has four cats.
    She has two cats. / He has four cats. / She has four cows.
Bebemos leche por la mañana. = We drink milk in the morning.
    We drink milk in the evening. / We drink coffee in the morning. / We spill milk in the morning.
La calle es estrecha. = The street is narrow.
    The street is wide. / The bridge is narrow. / The street is empty.
Ayer hizo mucho calor. = Yesterday it was very hot.
    Yesterday it was very cold. / Today it is very hot. / Yesterday it was very windy.
Mi madre vive en Madrid. = My mother lives in Madrid.
    My father lives in Madrid. / My mother works in Madrid. / My mother lives in Lisbon.
Quiero un vaso de vino. = I want a glass of wine.
    I want a glass of water. / I want a bottle of wine. / I have a glass of wine.
Los niños corren en el parque. = The children run in the park.
    The children sing in the park. / The dogs run in the park. / The children run in the house.
Mañana viajaré a la montaña. = Tomorrow I will travel to the mountains.
    Yesterday I travelled to the mountains. / Tomorrow I will travel to the beach. / Tomorrow I will see the mountains.
La llave está debajo de la silla. = The key is under the chair.
    The key is on the chair. / The key is under the carpet. / The letter is under the chair.
¿Dónde está el hospital? = Where is the hospital?
    When does the hospital open? / Where is the airport? / Who is in the hospital?
Mi hermano escribe un libro. = My brother writes a book.
    My brother reads a book. / My sister writes a book. / My brother writes a letter.
El camarero está cansado. = The waiter is tired.
    The waiter is hungry. / The driver is tired. / The waiter is angry.
Compramos naranjas en el mercado. = We buy oranges at the market.
    We buy lemons at the market. / We sell oranges at the market. / We buy oranges at the station.
La mujer joven canta muy bien. = The young woman sings very well.
    The old woman sings very well. / The young woman dances very well. / The young woman sings very badly.
Un año tiene doce meses. = A year has twelve months.
    A week has seven days. / A year has four seasons. / A day has twelve hours.
No me gusta el pescado. = I do not like fish.
    I like fish a lot. / I do not like chicken. / I do not eat bread.
La ventana está abierta. = The window is open.
    The window is closed. / The door is open. / The window is dirty.
Encontraron el dinero. = They found the money.
    They lost the money. / They found the road. / She found the money.
La luna está llena. = The moon is full.
    The moon is new. / The glass is full. / The sun is hot.
Mi tío tiene cinco hijas. = My uncle has five daughters.
    My uncle has three daughters. / My aunt has five daughters. / My uncle has five sons.
Él lleva un sombrero verde. = He is wearing a green hat.
    He is wearing a blue hat. / He is wearing a green coat. / He is buying a grey hat.
La profesora llega siempre tarde. = The teacher always arrives late.
    The teacher always arrives early. / The student always arrives late. / The teacher never arrives late.
Buscamos nuestra maleta. = We are looking for our suitcase.
    We are packing our suitcase. / We are looking for our tickets. / They are looking for their suitcase.
El pájaro vuela sobre el río. = The bird flies over the river.
    The bird flies over the house. / The plane flies over the river. / The fish swims in the river.
He olvidado las gafas. = I have forgotten my glasses.
    I have broken my glasses. / I have forgotten my gloves. / You have forgotten your keys.
El rey nació en invierno. = The king was born in winter.
    The king died in winter. / The king was born in summer. / The queen was born in winter.
El azúcar está en la caja roja. = The sugar is in the red box.
    The salt is in the red box. / The sugar is in the white box. / The sugar is in the red cup.
Estos zapatos son muy baratos. = These shoes are very cheap.
    These shoes are very expensive. / These trousers are very cheap. / These shoes are very dirty.
Mis abuelos tienen una granja pequeña. = My grandparents have a small farm.
    My grandparents have a large farm. / My parents have a small farm. / My grandparents have a small boat.
El carnicero corta la carne. = The butcher cuts the meat.
    The butcher weighs the meat. / The cook cuts the vegetables. / The butcher cuts his finger.
Me duele el brazo derecho. = My right arm hurts.
    My left arm hurts. / My right leg hurts. / My right ear hurts.
En verano vamos a la playa. = In summer we go to the beach.
    In winter we go to the beach. / In summer we go to the mountains. / In summer they come from the beach.
Necesito una cama más grande. = I need a bigger bed.
    I need a softer bed. / I need a bigger table. / I need a smaller house.
Ella vendió su bicicleta. = She sold her bicycle.
    She stole a bicycle. / She sold her necklace. / She repaired her bicycle.
La tienda cierra a las ocho. = The shop closes at eight.
    The shop opens at eight. / The shop closes at six. / The school closes at eight.
Mi abuela prepara una sopa. = My grandmother is making soup.
    My grandmother is baking a cake. / My grandfather is making soup. / My grandmother is eating soup.
Las flores son amarillas. = The flowers are yellow.
    The flowers are red. / The leaves are yellow. / The flowers are dry.
Gire a la izquierda en la iglesia. = Turn left at the church.
    Turn right at the church. / Turn left at the bank. / Stop at the church on the left.
El soldado tenía dos hijos. = The soldier had two sons.
    The soldier had two horses. / The sailor had two sons. / The soldier had ten sons.
Nieva desde el viernes. = It has been snowing since Friday.
    It has been raining since Friday. / It has been snowing since Sunday. / It stopped snowing on Friday.
Este puente es muy antiguo. = This bridge is very old.
    This bridge is very long. / This castle is very old. / This bridge is quite new.
Te espero detrás de la escuela. = I am waiting for you behind the school.
    I am waiting for you in front of the school. / I am waiting for you behind the bank. / I see you in the school.
El queso está en la mesa. = The cheese is on the table.
    The ham is on the table. / The cheese is in the fridge. / The cheese is on the floor.
Él nunca dice la verdad. = He never tells the truth.
    He always tells the truth. / He never tells lies. / She never tells the truth.
El ladrón rompió la ventana. = The thief broke the window.
    The thief closed the window. / The thief broke the lock. / The boy broke the window.
Las uvas maduran en otoño. = Grapes ripen in autumn.
    Grapes ripen in spring. / Apples ripen in autumn. / Leaves fall in autumn.
Mi hija tiene miedo de la oscuridad. = My daughter is afraid of the dark.
    My daughter is afraid of spiders. / My son is afraid of the dark. / My daughter is fond of the dark.
Cenamos en casa de un amigo. = We had dinner at a friend's house.
    We had breakfast at a friend's house. / We had dinner at a hotel. / We slept at a friend's house.
El campesino vende patatas. = The farmer sells potatoes.
    The farmer sells onions. / The farmer grows potatoes. / The merchant sells potatoes.
"""


def _pairs(text: str) -> tuple[tuple[str, ...], ...]:
    """(sentence, its English, three wrong ones), of two lines each."""
    lines = text.strip().split("\n")
    return tuple((*a.split(" = "), *b.strip().split(" / ")) for a, b in zip(lines[::2], lines[1::2], strict=True))


# language -> (sentence, its English, three wrong ones)
PAIRS = {"French": _pairs(_FRENCH), "Spanish": _pairs(_SPANISH)}
