"""The board as one HTML page: what it says (:mod:`views`, :mod:`cells`), what it draws (:mod:`plots`, :mod:`pictures`),
and how it looks (``page.html``, ``page.css``, ``page.js``). It needs no network and no file beside it."""
