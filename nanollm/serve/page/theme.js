/* Light or dark.
 *
 * The system's choice, unless the reader chose the other one here. A classic script in the head, not a module: it
 * decides before anything is painted, so that no page flashes.
 */
"use strict";

(() => {
    const KEY = "nanollm.theme";
    const system = window.matchMedia("(prefers-color-scheme: dark)");

    function readChoice() {
        try {
            return localStorage.getItem(KEY);
        } catch {
            return null; // storage is blocked: follow the system
        }
    }

    function keepChoice(choice) {
        try {
            if (choice === null) localStorage.removeItem(KEY);
            else localStorage.setItem(KEY, choice);
        } catch {
            console.info("the theme holds until the page is closed: this browser keeps nothing for it");
        }
    }

    let choice = readChoice();

    function isDark() {
        return choice === "dark" || (choice !== "light" && system.matches);
    }

    function show() {
        document.documentElement.dataset.theme = choice ?? "system";
        document.getElementById("theme")?.setAttribute("aria-pressed", String(isDark()));
    }

    function flip() {
        const wanted = isDark() ? "light" : "dark";
        const isSystems = wanted === (system.matches ? "dark" : "light");
        choice = isSystems ? null : wanted; // null: follow the system again
        keepChoice(choice);
        show();
    }

    show();
    system.addEventListener("change", show);
    document.addEventListener("DOMContentLoaded", () => {
        show();
        document.getElementById("theme").addEventListener("click", flip);
    });
})();
