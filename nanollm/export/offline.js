/* Keeps the page for when there is no network. The export wrote EDITION, which changes with any file of the page, and
 * FILES above; tab.js puts in what is large.
 */

const PLACE = `${self.registration.scope} `; // a host may have several such pages
const open = () => caches.open(PLACE + EDITION);

self.addEventListener("install", (event) => {
    const fresh = FILES.map((file) => new Request(file, { cache: "no-cache" }));
    event.waitUntil(open().then((cache) => cache.addAll(fresh)));
});

self.addEventListener("activate", (event) => {
    const isOld = (name) => name.startsWith(PLACE) && name !== PLACE + EDITION;
    event.waitUntil(caches.keys().then((names) => Promise.all(names.filter(isOld).map((name) => caches.delete(name)))));
});

self.addEventListener("fetch", (event) => {
    const kept = open().then((cache) => cache.match(event.request, { ignoreVary: true }));
    event.respondWith(kept.then((response) => response ?? fetch(event.request)));
});
